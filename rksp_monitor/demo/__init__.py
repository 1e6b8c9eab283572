"""``rksp demo``: one unstable run twice, with the loop and without it, and an honest page about both."""
