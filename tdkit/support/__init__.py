"""What every room uses: whole files, progress bars, tables, work shared by processes."""
