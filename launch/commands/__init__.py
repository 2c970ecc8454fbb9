"""The commands: a module with `main(argv)` each, imported only once signals are handled."""
