"""``python -m rksp_monitor`` is the ``rksp`` command."""

from rksp_monitor.cli import main

if __name__ == "__main__":
    main()
