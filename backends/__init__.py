"""Where a graph goes: a flat PyTorch program, pictures, pages."""
