"""What each script of launch/ does: a module with `main(argv)`, imported only once the script can be interrupted."""
