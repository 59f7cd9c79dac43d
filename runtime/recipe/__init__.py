"""Recipes: a file that says which models are shipped, and the rows that it asks for.

recipe_file: `read_recipe`, the recipe and every problem in it, with its place.
fields: the fields of a recipe, each with its type, default and meaning.
positions: `Positions`, the line and column of each key and value of a TOML text.
recipe: `Recipe`, and the `Problem` of a key.
defaults: `merged`, the models with the defaults that they can have.
checks: the values of a recipe that no export, validation or package could have.
combinations: values that exclude each other.
hashes: `Hashes`, those of the files that a recipe reads, kept between runs.
sources: what a model's source names (`source_kind`), and whether it changed (`fingerprint`).
steps: `steps_of`, the steps of a row, and the facts by which their results stay valid.
step_options: the options of a build and of a validation.
rows: `rows_of`, a row for each model, target and dtype, as plain data.
first_recipe: `first_recipe`, a recipe for one model (`rmsnorm init`).
"""
