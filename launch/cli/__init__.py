"""The command line: its list of commands, settings from presets and options, and advice on unknown options."""
