"""Recipes in YAML, one a method; their fields are those of compress.recipe.Recipe."""
