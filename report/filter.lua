-- Turns the report's Markdown into a document: numbered figures and tables, references to them, folded code, tables
-- from HTML, notices. Anything that would be lost without a trace (raw HTML, raw TeX, a reference to nowhere) stops the
-- build; a reference to what some cell declares and did not make on this device says that it is not there.

local kinds = {fig = "Figure", tbl = "Table"}
local absent = {fig = "a figure that is not there", tbl = "a table that is not there"}
local counts, numbers, declared = {fig = 0, tbl = 0}, {}, {}
local html = FORMAT:match("html") ~= nil

local function number(id, caption)
  local kind = id:match("^(%l+)-")
  if not kinds[kind] then error("a figure or table needs a label that starts with fig- or tbl-, not '" .. id .. "'") end
  if numbers[id] then error("label used twice: " .. id) end
  if #caption.long == 0 then error("no caption: " .. id) end
  counts[kind] = counts[kind] + 1
  numbers[id] = kinds[kind] .. " " .. counts[kind]
  if html then -- typst numbers by itself, in the same order
    local first = caption.long[1]
    caption.long[1] = pandoc.Plain({pandoc.Strong(numbers[id] .. ". ")} .. first.content)
  end
  return caption
end

local function each_cell(tbl, what)
  local sections = {tbl.head.rows}
  for _, body in ipairs(tbl.bodies) do table.insert(sections, body.body) end
  for _, rows in ipairs(sections) do
    for _, row in ipairs(rows) do
      for _, cell in ipairs(row.cells) do what(cell) end
    end
  end
end

local function boxed(tbl) -- in HTML a wide table scrolls in a box, outside of which its caption stands
  if not html then return tbl end
  each_cell(tbl, function(cell) -- of words, which may have several lines
    if utf8.len(pandoc.utils.stringify(cell.contents)) > 24 then cell.classes:insert("long") end
  end)
  local caption, attr = tbl.caption, pandoc.Attr(tbl.identifier, {"table"})
  tbl.caption, tbl.attr = {long = {}}, pandoc.Attr()
  return pandoc.Figure({pandoc.Div({tbl}, pandoc.Attr("", {"wide"}))}, caption, attr)
end

local function table_of(div)
  local caption, raw = div.content[1], div.content[2]
  local doc = pandoc.read(raw.text:gsub("<style.-</style>", ""), "html+tex_math_dollars")
  local tbl
  doc:walk({Table = function(t) tbl = t end})
  if not tbl then error("no table in " .. div.identifier) end
  tbl.attr = pandoc.Attr(div.identifier)
  tbl.caption = number(div.identifier, {long = pandoc.Blocks({pandoc.Plain(caption.content)})})
  each_cell(tbl, function(cell) cell.attr, cell.alignment = pandoc.Attr(), pandoc.AlignDefault end)
  for i = 1, #tbl.colspecs do tbl.colspecs[i] = {i == 1 and pandoc.AlignLeft or pandoc.AlignRight, nil} end
  return boxed(tbl)
end

local before = {
  Meta = function(meta)
    for _, id in ipairs(meta.declared or {}) do declared[pandoc.utils.stringify(id)] = true end
  end,
}

local first_pass = {
  traverse = "topdown",
  Div = function(div)
    if div.classes:includes("table") then return table_of(div), false end
    if div.classes:includes("calculator") and html then -- what stands in it is for print, and for readers without script
      local scripts = '<script src="laws.js"></script><script src="calculator.js"></script>'
      return {div, pandoc.RawBlock("html", scripts)}, false
    end
    if div.classes:includes("folded") then
      if not html then return {}, false end
      return {pandoc.RawBlock("html", "<details><summary>code</summary>"), div.content[1],
              pandoc.RawBlock("html", "</details>")}, false
    end
  end,
  Table = function(tbl) return boxed(tbl), false end,
  Figure = function(figure)
    local image
    figure:walk({Image = function(i) image = i end})
    figure.caption = number(figure.identifier, figure.caption)
    if html then figure.content = {pandoc.Div(figure.content, pandoc.Attr("", {"wide"}))} end
    return figure, false
  end,
  RawBlock = function(raw) error("raw " .. raw.format .. " would be lost: " .. raw.text:sub(1, 60)) end,
  RawInline = function(raw) error("raw " .. raw.format .. " would be lost: " .. raw.text:sub(1, 60)) end,
}

local second_pass = {
  Cite = function(cite)
    local id = cite.citations[1].id
    if numbers[id] then return pandoc.Link(numbers[id], "#" .. id) end
    local words = declared[id] and absent[id:match("^(%l+)-")]
    if not words then error("reference to nowhere: @" .. id) end
    return pandoc.Inlines(words)
  end,
}

local third_pass = { -- what template.typst calls by the same names, and style.css in HTML
  Math = function(math) -- a wide formula scrolls in a box of its own
    if html and math.mathtype == "DisplayMath" then return pandoc.Span({math}, pandoc.Attr("", {"wide", "formula"})) end
  end,
  Div = function(div)
    for _, look in ipairs({"broken", "notice"}) do
      if not html and div.classes:includes(look) then
        div.content:insert(1, pandoc.RawBlock("typst", "#" .. look .. "["))
        div.content:insert(pandoc.RawBlock("typst", "]"))
        return div.content
      end
    end
  end,
}

return {before, first_pass, second_pass, third_pass}
