"""The terminal and the page. Only the page's files import Streamlit; `terminal.py` does not."""
