"""The commands that bring a model to where it is served.

init: `rmsnorm init`.
package: `rmsnorm package`.
serve: `rmsnorm serve`.
serve_report: `rmsnorm serve-report`.
ship: `rmsnorm ship`.
signals: how servers come to an end.
verify: `rmsnorm verify`.
"""
