"""The snippets of docs/xla.md, which the ordinary tests leave out."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_xla", reason="needs torch_xla: make test-xla")

from tests.test_docs import FOR_XLA, ROOT, _blocks, _isolated, _Page  # noqa: F401


@pytest.mark.usefixtures("_isolated")
def test_snippets_run() -> None:
    page, blocks = _Page(), list(_blocks(ROOT / "docs" / "xla.md"))
    assert sum(block.kind in FOR_XLA for block in blocks) == 4
    for block in blocks:
        page.run(block)
