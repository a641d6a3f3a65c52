"""Model families: loading, token modalities, structure. Import submodules as needed."""
