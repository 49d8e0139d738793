"""flash_edu inside other libraries. Each module here imports its library; the package itself needs none of them."""
