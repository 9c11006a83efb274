"""The matrix: whatever may meet in a fit, in pairs.

``make stress`` runs it; ``docs/reliability.md`` says what came of it.

``axes`` says what is combined, ``pairs`` combines it, ``fits`` trains a cell and judges it, ``known`` lists what is
refused and what goes wrong for a reason, ``driver`` runs cells in processes of their own, ``report`` counts.
"""
