"""The work that a recipe describes (`rmsnorm ship`), and its results.

row_record: `row.json`, the steps of a row that are done, and those that remain.
ship_row: `ship_row`, which exports, validates and packages one row.
on_cluster: `rows_on_cluster`, which ships rows side by side on a cluster of Ray.
ship: `ship`, which does so for every row of a recipe.
summary: the summary as JSON, JUnit XML and an HTML page.
history: `history.jsonl`, a line for each run, and the reports of the rows.
report_server: `ReportServer`, which shows results over HTTP (`rmsnorm serve-report`).
"""
