"""What is installed on a pipeline, and the checks that it is in force."""
