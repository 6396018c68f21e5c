"""``python -m pfmc``."""

from __future__ import annotations

from pfmc.cli import main

if __name__ == "__main__":
    main()
