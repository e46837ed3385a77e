"""SAEs on the Hugging Face hub: names, well-known releases, and download into the hub's cache."""
