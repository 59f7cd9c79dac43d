"""The commands that bring a model to where it is served.

package: `rmsnorm package`.
verify: `rmsnorm verify`.
"""
