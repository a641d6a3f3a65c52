"""What runs have in common is computed once: artifacts, encoded prompts, statistics, hashes."""
