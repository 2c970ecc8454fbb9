"""The ranks that share a video: how they are arranged, what they agree on, and which layouts a method has."""
