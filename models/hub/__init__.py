"""Models of the Hugging Face hub: which revision, from which cache, with which token, and what of it is downloaded.

options: HubOptions and HubSource; using_hub and hub_options, the options that hold for a name; token_of, without_token.
download: open_checkpoint, the files of a checkpoint in the cache; companions_of; showing_downloads.
"""
