"""One module a command of ``rksp``; none of them imports torch before it runs."""
