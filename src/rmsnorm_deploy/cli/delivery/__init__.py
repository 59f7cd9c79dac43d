"""The commands that bring a model to where it is served.

init: `rmsnorm init`.
package: `rmsnorm package`.
ship: `rmsnorm ship`.
verify: `rmsnorm verify`.
"""
