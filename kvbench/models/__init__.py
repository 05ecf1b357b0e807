"""Loading models, tokenizers and chat wrappers; turning a sample's prompt into tokens."""
