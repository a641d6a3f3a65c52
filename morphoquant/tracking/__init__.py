"""Run directories, fingerprints, progress, and the tracker that mirrors them."""
