"""Draw the plots and write the generated pages: `python -m benchmarks.report`."""

from benchmarks.report.docs import PAGES, write_pages
from benchmarks.report.plots import draw_all

for path in [*draw_all(), *PAGES]:
    print(path)
write_pages()
