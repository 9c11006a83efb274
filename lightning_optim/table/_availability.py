"""Whether an optional package can be used here, decided from metadata alone: nothing is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from lightning_optim.errors import MissingDependency


@dataclass(frozen=True)
class Requirement:
    """A package that an identifier needs.

    Attributes:
        distribution: Name on PyPI, what ``pip install`` takes.
        module: Name that ``import`` takes.
        versions: PEP 440 specifier of the versions our adapter works with.
        broken: PEP 440 specifier of versions that are known to give wrong results; may be empty.
        broken_reason: What is wrong in the ``broken`` versions.
        torch: PEP 440 specifier of the versions of torch it can be imported with; empty means all that we take.
        torch_command: What to type where torch is another one.
        same_minor_as: A distribution whose major and minor version this one has to share, because it was built
            against it; may be empty.
        namesake: What the distribution is if it has no such module; empty means a broken installation.
        command: What to type to install it; empty means ``pip install`` of the distribution.
        device: The type of device that torch knows only with this package; may be empty.
    """

    distribution: str
    module: str
    versions: str = ""
    broken: str = ""
    broken_reason: str = ""
    torch: str = ""
    torch_command: str = ""
    same_minor_as: str = ""
    namesake: str = ""
    command: str = ""
    device: str = ""

    @property
    def install_command(self) -> str:
        """The command that satisfies this requirement."""
        if not self._takes_torch():
            return self.torch_command
        return self.command or f"pip install --upgrade '{self.distribution}{self.versions}'"

    def installed_version(self) -> str | None:
        """Returns the version of the installed distribution, or ``None``."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def problem(self) -> str | None:
        """Returns why the package cannot be used here, with the command that helps, or ``None`` if it can."""
        version = self.installed_version()
        if version is None:
            return f"the package {self.distribution!r} is not installed: {self.install_command}"
        if self.broken and Version(version) in SpecifierSet(self.broken, prereleases=True):
            return f"{self.distribution} {version} {self.broken_reason}: {self.install_command}"
        if self.versions and Version(version) not in SpecifierSet(self.versions, prereleases=True):
            return f"{self.distribution} {version} is installed, {self.versions} is needed: {self.install_command}"
        if not self._takes_torch():
            return (
                f"{self.distribution} {version} needs torch{self.torch}, and {importlib.metadata.version('torch')} is "
                f"installed: {self.install_command}"
            )
        if self.same_minor_as:
            other = importlib.metadata.version(self.same_minor_as)
            if Version(other).release[:2] != Version(version).release[:2]:
                return (
                    f"{self.distribution} {version} needs {self.same_minor_as} of the same version, and {other} is "
                    f"installed: {self.install_command}"
                )
        if importlib.util.find_spec(self.module) is None:
            if self.namesake:
                return f"the package {self.distribution!r} that is installed is {self.namesake}: {self.install_command}"
            return (
                f"{self.distribution} {version} is installed but has no module {self.module!r} "
                f"(a broken installation): {self.install_command} --force-reinstall"
            )
        return None

    def _takes_torch(self) -> bool:
        # A build from before a release has what the release has: NVIDIA's images call theirs 2.10.0a0.
        return Version(Version(importlib.metadata.version("torch")).base_version) in SpecifierSet(self.torch)


@dataclass(frozen=True)
class Availability:
    """Whether an identifier can run here, and if not, every reason why."""

    ok: bool
    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.ok


def check(requirements: tuple[Requirement, ...]) -> Availability:
    """Returns whether all ``requirements`` hold, without importing any of them."""
    reasons = tuple(problem for requirement in requirements if (problem := requirement.problem()))
    return Availability(not reasons, reasons)


def ensure(name: str, requirements: tuple[Requirement, ...], nearest: Sequence[str] = ()) -> None:
    """Raises :class:`MissingDependency` if ``name`` cannot run here, with the commands to type.

    Args:
        name: The identifier.
        requirements: What it needs.
        nearest: Identifiers to offer in its place, the best first.
    """
    availability = check(requirements)
    if not availability:
        raise missing(name, availability.reasons, nearest)


def missing(name: str, reasons: Sequence[str], nearest: Sequence[str] = ()) -> MissingDependency:
    """Returns the error that says why ``name`` cannot run here and what to use in its place."""
    instead = f". Or use optim={nearest[0]!r} (optim_fallback=True does so by itself)" if nearest else ""
    return MissingDependency(f"optim={name!r} cannot run here: {'; '.join(reasons)}{instead}", code="LO107")
