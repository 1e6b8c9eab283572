"""What moves before a run diverges, and which alarm follows from it."""
