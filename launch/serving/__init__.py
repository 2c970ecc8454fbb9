"""serve.py: requests as items of a batch, the jobs of a folder, and HTTP."""
