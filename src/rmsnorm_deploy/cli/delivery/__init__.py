"""The commands that bring a model to where it is served.

init: `rmsnorm init`.
package: `rmsnorm package`.
push: `rmsnorm push`.
serve: `rmsnorm serve`.
serve_report: `rmsnorm serve-report`.
ship: `rmsnorm ship`.
signals: how servers come to an end.
verify: `rmsnorm verify`.
"""
