"""The ``rksp`` command and the daemon that watches a training job."""
