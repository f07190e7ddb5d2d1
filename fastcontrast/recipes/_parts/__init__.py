"""What single recipes are made of beside their own file: layers of a model, data, a picture."""
