"""How a model is called, looked into while it runs, and cut into shards."""
