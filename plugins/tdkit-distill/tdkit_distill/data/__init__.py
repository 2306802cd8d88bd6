"""What a stage trains on: numbered rows, from text, labelled text or tensors."""
