"""The commands: a module with `run(given)` each, imported only once signals are handled."""
