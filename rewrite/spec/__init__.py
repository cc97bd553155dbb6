"""The spec: what it may say, read and checked with the place of each mistake; its JSON Schema; the page that tells its methods."""
