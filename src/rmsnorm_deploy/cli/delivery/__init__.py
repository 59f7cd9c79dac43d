"""The commands that bring a model to where it is served.

init: `rmsnorm init`.
package: `rmsnorm package`.
push: `rmsnorm push`.
ship: `rmsnorm ship`.
verify: `rmsnorm verify`.
"""
