"""What each family of codecs is: a spec, that is text, settings, sections and static size; a file each."""
