// (filled by its layer)
