"""From the files of a ladder to a judged, self-contained page: reads files only and never imports torch."""
