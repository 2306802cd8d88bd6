"""What a stage minimises: the kinds of loss, and the registry that packages add to."""
