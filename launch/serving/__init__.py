"""What serve.py does: requests of clients to items of a batch, the jobs of a folder, and HTTP around them."""
