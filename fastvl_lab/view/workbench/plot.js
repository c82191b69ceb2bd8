// A plotly figure that is replaced as a whole: the page draws what `figure` says, as wide as its room, and nothing of what was
// there before. `dark` tells the kernel whether the page's theme is a dark one.
export default () => {
  let Plotly;

  return {
    // plotly.js comes from the Python package, so that no network is needed.
    initialize({ model }) {
      const library = { exports: {} };
      new Function("module", "exports", model.get("library"))(library, library.exports);
      Plotly = library.exports;
    },

    render({ model, el }) {
      const place = el.appendChild(document.createElement("div"));
      let width = 0; // of the room in pixels; 0 until it is seen
      let drawn = Promise.resolve();

      const draw = () => {
        if (width === 0) return;
        drawn = drawn.then(() => {
          const { data, layout } = JSON.parse(model.get("figure"));
          return Plotly.react(place, data, { ...layout, width }, model.get("config"));
        });
      };
      const sized = new ResizeObserver(([entry]) => {
        const free = Math.floor(entry.contentRect.width);
        if (free === width) return;
        width = free;
        draw();
      });
      sized.observe(el);
      model.on("change:figure", draw);

      // JupyterLab and Voila say of their theme on the body whether it is light; a page that says nothing is.
      const themed = () => {
        model.set("dark", document.body.dataset.jpThemeLight === "false");
        model.save_changes();
      };
      const changed = new MutationObserver(themed);
      changed.observe(document.body, { attributeFilter: ["data-jp-theme-light"] });
      themed();

      return () => {
        sized.disconnect();
        changed.disconnect();
        model.off("change:figure", draw);
        Plotly.purge(place);
      };
    },
  };
};
