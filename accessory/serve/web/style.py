"""How the pages look, and the script by which an open page hears that its model is gone.

Everything is in the page itself: a computer without the internet shows it as well.
"""

import gradio as gr

STATE_ROUTE = "/model-state"


def theme() -> gr.themes.ThemeClass:
    """Quiet colours, and the fonts that the reader's system has."""
    sans = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    mono = ("ui-monospace", "Consolas", "Menlo", "monospace")
    return gr.themes.Base(primary_hue="indigo", neutral_hue="slate", radius_size="md", font=sans, font_mono=mono)


CSS = """
.gradio-container { width: 100% !important; max-width: 1080px !important; margin: 0 auto !important; }
h1 { font-size: 1.4rem; font-weight: 600; margin-bottom: .1rem; }
.model { color: var(--body-text-color-subdued); }
.status { min-height: 1.5em; color: var(--body-text-color-subdued); }
.status.error { color: var(--error-text-color, #b91c1c); font-weight: 600; }
#model-lost { position: sticky; top: 0; z-index: 1000; padding: .75rem 1rem; color: white; background: #b91c1c;
  font-weight: 600; text-align: center; }
#shares { overflow-x: auto; }
#shares table.experts, #shares table.experts :is(th, td) { border: none; }
table.experts { width: 100%; border-collapse: separate; border-spacing: 2px; font-variant-numeric: tabular-nums; }
table.experts caption { text-align: left; padding-bottom: .5rem; color: var(--body-text-color-subdued); }
#shares table.experts th { text-align: center; font-weight: 500; padding: .1rem .5rem;
  color: var(--body-text-color-subdued); }
table.experts td { min-width: 2rem; padding: .3rem .4rem; text-align: center; border-radius: 4px;
  color: var(--body-text-color);
  background: color-mix(in srgb, var(--primary-500) calc(85% * var(--strength)), var(--background-fill-secondary)); }
#chat .message-content { white-space: pre-wrap; overflow-wrap: anywhere; }
#coloured .text { white-space: pre-wrap; }
.dark #coloured :is(.token.highlighted, .legend-item) { color: white !important; }
#coloured .token, #coloured .token-container { margin: 0; padding-inline: 1px; }
"""

# Asks every other second, and says on the page what it hears; also that nobody answers any more.
HEAD = f"""
<script>
(() => {{
  const say = (text) => {{
    let bar = document.getElementById("model-lost");
    if (!bar) {{
      bar = document.createElement("div");
      bar.id = "model-lost";
      bar.setAttribute("role", "alert");
      document.body.prepend(bar);
    }}
    bar.textContent = text;
    bar.hidden = text === "";
  }};
  let missed = 0;
  setInterval(async () => {{
    try {{
      const answer = await fetch(".{STATE_ROUTE}", {{ cache: "no-store" }});
      const state = await answer.json();
      missed = 0;
      say(state.failure ? "The model is gone: " + state.failure : "");
    }} catch {{
      missed += 1;
      if (missed > 1) say("The demo has ended, or the connection to it is lost.");
    }}
  }}, 2000);
}})();
</script>
"""
