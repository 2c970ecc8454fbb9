"""Measures of videos as arrays: of any video, and exact ones of the embedded world; knows no model and no file."""
