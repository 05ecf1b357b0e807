"""Operations that methods and runtime share, in torch and in Triton, and the choice between the two."""
