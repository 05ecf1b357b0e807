"""What happens inside an attention layer: observed prefill and ragged decoding, in torch and in Triton."""
