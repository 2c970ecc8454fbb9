"""Long videos from pretrained pipelines: configuration, loading, hooks, denoising, decoding and output."""
