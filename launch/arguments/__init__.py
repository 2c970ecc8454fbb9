"""What each command accepts: its options and their checks, without torch, so that a mistake is answered at once."""
