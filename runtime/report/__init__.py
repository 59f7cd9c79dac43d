"""Write the report of a validation as HTML or JUnit XML, read it again, and compare two results.

html: `render` and `write`, one HTML page.
junit: `render` and `write`, JUnit XML for CI systems.
plots: `depth` and `histogram`, the plots of the HTML page as SVG.
summary_page: `render`, the page of a recipe's results; `render_drift`, that of two of its runs.
trend: `chart`, a figure over the runs of a recipe.
margins: `nearness`, how near a report is to its limits.
norm_providers: which execution providers ran the norms, as lines of a report.
printed: tables and lines of a validation, a comparison and a risk report.
text: numbers and names as text, and `write_text`.
report_fields: the types of a report's fields.
report_file: `read_report`, and the schemas of the reports.
compare: `compare`, for two files of arrays or two reports.
"""
