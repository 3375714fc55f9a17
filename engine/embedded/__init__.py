"""The embedded world: procedural scenes, their checker, and a small model that draws them."""
