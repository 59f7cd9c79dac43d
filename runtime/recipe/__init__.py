"""Recipes: a file that says which models are shipped, and the work that it describes (`rmsnorm ship`).

recipe_file: `read_recipe`, the recipe and every problem in it, with its place.
positions: `Positions`, the line and column of each key and value of a TOML text.
recipe: `Recipe`, and the `Problem` of a key.
checks: the values of a recipe that no export, validation or package could have.
sources: what a model's source names (`source_kind`), and whether it changed (`fingerprint`).
rows: `rows_of`, a row for each model, target and dtype, as plain data.
row_record: `row.json`, the steps of a row that are done, and those that remain.
ship_row: `ship_row`, which exports, validates and packages one row.
on_cluster: `rows_on_cluster`, which ships rows side by side on a cluster of Ray.
ship: `ship`, which does so for every row of a recipe.
summary: the summary as JSON, JUnit XML and an HTML page.
history: `history.jsonl`, a line for each run, and the reports of the rows.
report_server: `ReportServer`, which shows results over HTTP (`rmsnorm serve-report`).
first_recipe: `first_recipe`, a recipe for one model (`rmsnorm init`).
"""
